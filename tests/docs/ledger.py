"""Where each documented command is run: here, by another test, or why nowhere. A command that is in none of these fails a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What makes a run of the shipped configs small. It changes no path and no part of the recipe.
SMALL = "batch.global_size=4 batch.micro_tokens=512 batch.epochs=null batch.steps=2 data.sequence_length=256 precision.compute=fp32"
FEW = "--per-class 5 --draws 2"
# The shards are small, too: of grow_7b's phases each takes all there are.
ALL_OF_THEM = " ".join(f"phases.{n}.run.data.shards.0.most=null" for n in range(2, 12))


@dataclass(frozen=True)
class Run:
    """Run in the tiny world, in this order, with `more` behind it. `put`: what stands for the page's placeholders, in order."""

    text: str
    more: str = ""
    put: Mapping[str, str] = field(default_factory=dict)


RUNS = (
    Run("pivot doctor"),
    Run("pivot data llava blip_laion_cc_sbu_558k.json --images images --out shards/llava-558k", "--workers 0"),
    Run("pivot data onevision LLaVA-OneVision-Data --out shards/llava-onevision-single-image", "--workers 0"),
    Run("pivot data mmpr MMPR-v1.2 --tokenizer checkpoints/Qwen2.5-1.5B-Instruct --out shards/mmpr-20k", "--workers 0"),
    Run("pivot check configs/run/*.yaml"),
    Run("pivot train configs/run/1a_align.yaml", SMALL),
    Run("pivot train configs/run/1b_pretrain.yaml", SMALL),
    Run("pivot reference configs/run/2_dpo.yaml layout.tensor=2", SMALL),
    Run("pivot train configs/run/2_dpo.yaml layout.tensor=2", SMALL),
    Run(
        "pivot convert export runs/2_dpo --part encoder --out evolved --last-layer original --original checkpoints/siglip2-so400m-patch16-384"
    ),
    Run("pivot convert export runs/2_dpo --part mllm --out evolved-llava"),
    Run(
        "pivot probe linear checkpoints/siglip2-so400m-patch16-384 runs/2_sft runs/2_dpo --train imagenet/train --test imagenet/val",
        FEW,
    ),
    Run("pivot data synthetic --count 2000 --seed 5 --out runs/mine/pairs", "--count 12 --image-size 48"),
    Run("pivot data inspect runs/mine/pairs --sheet runs/mine/pairs.html"),
    Run("pivot check configs/demo/2_dpo.yaml"),
    Run("pivot show configs/demo/2_dpo.yaml name=mine out=runs/mine/dpo data.shards=[runs/mine/pairs] --key batch"),
    Run(
        "pivot train configs/demo/2_dpo.yaml name=mine out=runs/mine/dpo data.shards=[runs/mine/pairs] --processes 2",
        "batch.global_size=4 batch.steps=2 batch.epochs=null",
    ),
    Run("pivot checkpoint list runs/mine/dpo"),
    Run("pivot convert export runs/mine/dpo --part encoder --out runs/mine/encoder"),
    Run(
        "pivot probe answers runs/demo/runs/pretrain runs/mine/dpo --pairs runs/demo/data/held_out --count 100",
        "--count 3",
    ),
    Run("pivot check configs/run/1a_align.yaml configs/run/1b_pretrain.yaml configs/run/2_dpo.yaml"),
    Run("pivot data index FOLDER", "--workers 0", {"FOLDER": "shards/pairs"}),
    Run("pivot data index FOLDER --check", "--workers 0", {"FOLDER": "shards/pairs"}),
    Run("pivot data inspect FOLDER --sheet page.html", put={"FOLDER": "shards/pairs"}),
    Run("pivot data synthetic --count 1000 --out DIR", "--count 4", {"DIR": "shards/rendered"}),
    Run(
        "pivot data mmpr MMPR-v1.2 --tokenizer checkpoints/Qwen2.5-1.5B-Instruct --out shards/mmpr-20k --sft shards/mmpr-20k-sft",
        "--workers 0",
        {"shards/mmpr-20k ": "shards/mmpr-twin "},
    ),
    Run("pivot data onevision LLaVA-OneVision-Data --out shards/onevision", "--workers 0"),
    Run("pivot data cambrian Cambrian737k.jsonl --images images --out shards/cambrian", "--workers 0"),
    Run("pivot show configs/run/2_dpo.yaml layout.tensor=2"),
    Run(
        "pivot train configs/run/1a_align.yaml layout.tensor=2 model.llm.hf=checkpoints/Qwen2.5-7B-Instruct out=runs/1a_7b",
        SMALL,
    ),
    Run("pivot checkpoint list runs/2_dpo"),
    Run("pivot checkpoint inspect runs/2_dpo"),
    Run("pivot checkpoint prune runs/2_dpo --keep 1 --dry-run"),
    Run("pivot convert export runs/2_dpo --part encoder --out evolved", put={"--out evolved": "--out exports/evolved"}),
    Run(
        "pivot convert export runs/2_dpo --part encoder --out evolved-full --last-layer original "
        "--original checkpoints/siglip2-so400m-patch16-384"
    ),
    Run(
        "pivot convert import --encoder E --llm L --out CKPT",
        put={"E ": "evolved-full ", "L ": "checkpoints/Qwen2.5-1.5B-Instruct "},
    ),
    Run(
        "pivot convert verify CKPT --encoder E --llm L",
        put={"--encoder E": "--encoder evolved-full", "--llm L": "--llm checkpoints/Qwen2.5-1.5B-Instruct"},
    ),
    Run("pivot convert import --mllm LLAVA --out CKPT", put={"CKPT": "CKPT-assembled"}),
    Run("pivot convert verify CKPT --mllm LLAVA", put={"CKPT": "CKPT-assembled"}),
    Run("pivot convert import --encoder clip-vit-large-patch14-336 --llm Qwen2.5-0.5B-Instruct --out checkpoint"),
    Run("pivot convert verify checkpoint --encoder clip-vit-large-patch14-336"),
    Run("pivot convert export checkpoint --part encoder --out export"),
    Run("pivot evolve configs/evolve/grow_7b.yaml --runs", f"every.batch.global_size=4 {ALL_OF_THEM}"),
    Run(
        "pivot plan configs/run/1a_align.yaml --encoder siglip2-so400m-patch16-384 --head qwen2.5-1.5b --samples 558000"
    ),
    Run(
        "pivot plan configs/run/1b_pretrain.yaml "
        "--encoder siglip2-so400m-patch16-384 --head qwen2.5-1.5b --samples 3000000"
    ),
    Run("pivot plan configs/run/2_dpo.yaml --encoder siglip2-so400m-patch16-384 --head qwen2.5-1.5b --samples 20000"),
    Run(
        "pivot plan configs/run/2_dpo.yaml "
        "--encoder siglip2-so400m-patch16-384 --head qwen2.5-1.5b --samples 20000 --layout own --explain"
    ),
    Run(
        "pivot plan configs/run/2_dpo.yaml "
        "--encoder siglip2-so400m-patch16-384 --head qwen2.5-72b --samples 20000 --gpus 512 --top 5 --dry-run"
    ),
    Run(
        "pivot plan configs/run/2_dpo.yaml "
        "--encoder siglip2-so400m-patch16-384 --head qwen2.5-7b --samples 20000 --gpus 64"
    ),
    Run(
        "pivot plan configs/run/2_dpo.yaml "
        "--encoder siglip2-so400m-patch16-384 --head qwen2.5-7b --samples 20000 --gpus 64 --dry-run"
    ),
    Run(
        "pivot plan configs/run/2_dpo.yaml "
        "--encoder siglip2-so400m-patch16-384 --head qwen2.5-7b --samples 20000 --gpus 64 --top 5 --dry-run"
    ),
    Run(
        "pivot plan configs/run/2_dpo.yaml "
        "--encoder siglip2-so400m-patch16-384 --head qwen2.5-7b --samples 20000 --scaling"
    ),
    Run("pivot bench calibrate --out machine.yaml", "--processes 1 --precision fp32"),
    Run(
        "pivot plan RUN.yaml --machine machine.yaml --gpus 2",
        SMALL,
        {"RUN.yaml": "configs/run/2_dpo.yaml", "--gpus 2": "--gpus 1"},
    ),
    Run("pivot convert export runs/2_dpo --part mllm --out exports/mllm"),
    Run("pivot convert export runs/2_dpo --part encoder --out exports/encoder"),
    Run("pivot convert export runs/3b_reassemble_tune --part mllm --out exports/pivot"),
    Run(
        "pivot probe vqa results/exports__base results/exports__sft results/exports__pivot --markdown --out runs/probe-vqa"
    ),
    Run(
        "pivot probe linear ENCODER --train DIR --test DIR --per-class 50 --draws 3 --projected --classifier logistic",
        FEW,
        {"ENCODER": "runs/2_dpo", "DIR": "imagenet/train", "--test DIR": "--test imagenet/val"},
    ),
    Run(
        "pivot probe alignment ENCODER --llm DIR --captions DIR --count 1024 --neighbours 10",
        "--count 12 --neighbours 3",
        {
            "ENCODER": "evolved",
            "DIR": "checkpoints/Qwen2.5-1.5B-Instruct",
            "--captions DIR": "--captions shards/captions",
        },
    ),
    Run(
        "pivot probe segmentation ENCODER --train DIR --test DIR --classes 151 --epochs 5 --seeds 6",
        "--epochs 1 --seeds 2",
        {
            "ENCODER": "evolved",
            "DIR": "ADEChallengeData2016/images/training",
            "--test DIR": "--test ADEChallengeData2016/images/validation",
        },
    ),
    Run(
        "pivot probe gradcam MODEL --samples FILE --objective dpo sft --steps 20 --rate 1e-5 --at input",
        "--steps 1",
        {"MODEL": "runs/2_dpo", "FILE": "samples.jsonl"},
    ),
    Run(
        "pivot probe answers MODEL --pairs SHARDS --count 300",
        "--count 3",
        {"MODEL": "runs/2_dpo", "SHARDS": "runs/demo/data/held_out"},
    ),
)

ELSEWHERE = {
    "pivot bench layouts --shape vocabulary --processes 2 --rounds 1 --steps 3 --machine machine.yaml": (
        "tests/dist/test_layouts.py::test_every_layout_of_two_processes"
    ),
    "pivot bench layouts --shape body --processes 2 --rounds 1 --steps 2 --machine machine.yaml": (
        "tests/dist/test_layouts.py::test_every_layout_of_two_processes"
    ),
    "make demo": "tests/dist/test_demo.py::test_demo_goes_on_after_ctrl_c_and_kill",
    "pivot check configs/evolve/grow_7b.yaml": "tests/unit/test_schedule_ready.py::test_a_schedule_is_checked_as_one",
    "pivot evolve configs/evolve/single.yaml": "tests/dist/test_evolve.py::test_an_encoder_goes_through_two_heads",
    "pivot evolve configs/evolve/grow_7b.yaml": "tests/dist/test_evolve.py::test_an_encoder_goes_through_two_heads",
    "pivot evolve configs/evolve/tiny.yaml --processes 2": "tests/dist/test_evolve.py::test_an_encoder_goes_through_two_heads",
    "launch/evolve.sh --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 -- configs/evolve/grow_7b.yaml": (
        "tests/slurm/test_slurm.py::test_a_schedule_is_a_chain_of_runs_and_judgements"
    ),
    "sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/pivot_dpo.sh configs/run/2_dpo.yaml layout.tensor=2 layout.pipeline=2": (
        "tests/slurm/test_slurm.py::test_a_preempted_run_is_queued_again_and_goes_on"
    ),
    "pivot train configs/run/2_dpo.yaml tracking.wandb=online tracking.tensorboard=true": (
        "tests/dist/test_tracking.py::test_both_hold_what_metrics_has_across_a_resumption"
    ),
    "pivot compare configs/run/2_dpo.yaml configs/run/2_sft.yaml configs/run/2_mpo.yaml --train imagenet/train --test imagenet/val": (
        "tests/dist/test_compare.py::test_the_command"
    ),
    "pivot compare RUN.yaml --train IMAGES --test IMAGES --pairs SHARDS --seeds 1 2 3 4 5 --samples 3000 10000 20000": (
        "tests/dist/test_compare.py::test_the_command"
    ),
    "pivot compare configs/demo/2_dpo.yaml configs/demo/2_sft.yaml configs/demo/2_mpo.yaml --samples 500 1000 --processes 2 --set "
    "model.encoder.checkpoint=runs/tiny/evolve/learn-small/run model.llm.checkpoint=runs/tiny/evolve/learn-small/run "
    "model.projector.checkpoint=runs/tiny/evolve/learn-small/run data.shards=[runs/tiny/data/pairs] --train runs/tiny/data/scenes/train "
    "--test runs/tiny/data/scenes/test": "tests/dist/test_compare.py::test_the_command",
    "pivot bench layouts --shape body": "tests/dist/test_layouts.py::test_every_layout_of_two_processes",
    "pivot bench layouts --shape body --processes 2": "tests/dist/test_layouts.py::test_every_layout_of_two_processes",
    "pivot bench layouts RUN.yaml --machine machine.yaml": "tests/dist/test_layouts.py::test_every_layout_of_two_processes",
    "pivot bench layouts RUN.yaml": "tests/dist/test_layouts.py::test_every_layout_of_two_processes",
    "pivot bench layouts configs/run/2_dpo.yaml --processes 8": "tests/dist/test_layouts.py::test_every_layout_of_two_processes",
    "pivot bench layouts RUN.yaml configs/layout/tp1.yaml configs/layout/tp2.yaml --rounds 3 --steps 5 --no-data "
    "batch.micro_tokens=4096": "tests/dist/test_layouts.py::test_one_batch_again_and_again",
    "docker/install.sh dependencies ~/pivot image": (
        "tests/package/test_install.py::test_torch_is_the_images_own_and_the_rest_is_pinned"
    ),
    "docker/install.sh project ~/pivot": (
        "tests/package/test_install.py::test_what_runs_is_the_folder_that_a_checkout_may_be_mounted_on"
    ),
    "docker/install.sh check ~/pivot": "tests/package/test_install.py::test_a_torch_put_before_the_images_ends_the_build",
    "pivot bench peers --shape vocabulary": "tests/parity/test_trl.py::test_the_page_of_a_comparison",
    "pivot bench peers --shape vocabulary --settings pivot:1 trl:2 --rounds 1": "tests/parity/test_trl.py::test_the_page_of_a_comparison",
    "pivot bench peers --shape vocabulary --trl-environment MALLOC_MMAP_THRESHOLD_=4294967296 "
    "--trl-environment MALLOC_TRIM_THRESHOLD_=17179869184": "tests/parity/test_trl.py::test_the_page_of_a_comparison",
    "pivot data inspect shards/mine --sheet page.html --tokenizer checkpoints/Qwen2.5-1.5B-Instruct": (
        "tests/docs/test_examples.py::test_a_data_set_is_added"
    ),
    "python -m pivot_megatron.recipe.tiny_world runs/tiny": "tests/docs/test_examples.py::test_the_tiny_world_has_what_its_schedule_names",
    "python tools/gpu_check.py --out runs/gpu-check": "tests/unit/test_gpu_check.py::test_without_a_gpu_what_needs_none_runs_small",
    "python launch/nemo_run.py configs/run/2_dpo.yaml --processes 8": "tests/dist/test_nemo_run.py::test_a_run_of_two_processes",
    "python launch/nemo_run.py configs/run/2_dpo.yaml layout.tensor=2 --slurm --account A --partition gpu --nodes 4 --processes 8 "
    "--host login.example --job-dir /scratch/me/nemo --time 24:00:00 --dry-run": (
        "tests/dist/test_nemo_run.py::test_a_run_of_two_processes"
    ),
}

VERBS = {
    "pivot demo": "tests/dist/test_demo.py::test_demo_goes_on_after_ctrl_c_and_kill",
    "pivot bench profile": "tests/unit/test_bench_profile.py::test_every_kind_of_operation_has_its_share_of_a_step",
    "pivot bench convert": "tests/dist/test_convert.py::test_a_conversion_is_measured",
    "pivot bench loader": "tests/unit/test_bench_loader.py::test_every_way_is_measured",
    "pivot bench runs": "tests/unit/test_bench_runs.py::test_medians_of_what_comes_after_the_warm_up",
}
"""What the pages name in their text alone."""

NOT_RUN = {
    "make test": "is what runs this",
    "source .venv/bin/activate": "an environment's own script",
    "source ~/pivot/bin/activate": "an environment's own script",
    **{
        f"PIVOT_ENV=launch/env/{env}.sh PIVOT_IMAGE=/shared/pivot.{image} PIVOT_MOUNTS={mounts} sbatch --nodes=2 --gpus-per-node=8 "
        "--ntasks-per-node=8 launch/pivot_dpo.sh configs/run/2_dpo.yaml": "containers on a cluster"
        for env, image, mounts in (("apptainer", "sif", "/data"), ("pyxis", "sqsh", "/data:/data"))
    },
    "pip install pivot-megatron[nemo]": "would change the environment that runs this",
    ".venv/bin/pytest -m not slow tests/parity/test_families.py tests/parity/test_export.py tests/parity/test_shapes.py -k clip or CLIP": (
        "a part of `make test`"
    ),
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$HEAD:29500 -m pivot_megatron.cli train "
    "configs/run/2_dpo.yaml layout.tensor=2 layout.pipeline=2": "two nodes of eight GPUs",
    "pivot bench peers --shape so400m_0.5b --steps 12": "a GPU",
    "python -m venv lmms": "lmms-eval and its questions come from the network",
}
NOT_RUN_PROGRAMS = {"lmms/bin/pip", "lmms/bin/python", "lmms/bin/accelerate", "docker", "enroot", "apptainer"}
"""Of lmms-eval's environment, which is not here, and of containers: the GPU image's steps are run by tests/package."""
