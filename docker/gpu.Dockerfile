# NVIDIA's PyTorch image, and the project in an environment on top of it; see docs/cluster.md.
#   docker build -f docker/gpu.Dockerfile -t pivot-megatron:gpu --build-arg REVISION="$(git rev-parse HEAD)" .
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/pivot/src

# Before the code: a change of that leaves this layer as it is.
COPY pyproject.toml constraints.txt ./
COPY docker/install.sh docker/packages.py docker/
ARG EXTRAS=remote,tracking
RUN docker/install.sh dependencies /opt/pivot/venv image "${EXTRAS}"

COPY LICENSE NOTICE README.md ./
COPY configs configs
COPY tools/convert tools/convert
COPY pivot_megatron pivot_megatron
RUN docker/install.sh project /opt/pivot/venv && chmod -R a+rX .

# Anyone may be the user: SLURM and apptainer run a container as whoever submits. So its home, caches and folder take all.
ARG UID=1000
RUN useradd --no-log-init --non-unique --uid "${UID}" --create-home pivot \
    && mkdir -p /cache /work \
    && chmod 1777 /home/pivot /cache /work
ENV PATH=/opt/pivot/venv/bin:${PATH} \
    HOME=/home/pivot \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
USER ${UID}
RUN docker/install.sh check /opt/pivot/venv && find /cache -mindepth 1 -delete
VOLUME /cache
WORKDIR /work

# The base's entrypoint stays: it finds CUDA's libraries for the driver and then becomes the command. pyxis and apptainer pass it by.
CMD ["pivot", "doctor"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="PIVOT-Megatron" \
    org.opencontainers.image.description="Evolves vision encoders by preference training through a language-model head" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${REVISION}"
