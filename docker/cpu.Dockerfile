# The project with torch's CPU build: for trying, testing and debugging; see docs/cluster.md.
#   docker build -f docker/cpu.Dockerfile -t pivot-megatron:cpu --build-arg REVISION="$(git rev-parse HEAD)" .
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim

ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/pivot/src

# Before the code: a change of that leaves this layer as it is.
COPY pyproject.toml constraints.txt ./
COPY docker/install.sh docker/packages.py docker/
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" docker/install.sh dependencies /opt/pivot/venv index "${EXTRAS}"

COPY LICENSE NOTICE README.md ./
COPY configs configs
COPY tools/convert tools/convert
COPY pivot_megatron pivot_megatron
RUN docker/install.sh project /opt/pivot/venv && chmod -R a+rX .

# Anyone may be the user (docker run --user): so its home, caches and folder take all.
ARG UID=1000
RUN useradd --no-log-init --non-unique --uid "${UID}" --create-home pivot \
    && mkdir -p /cache /work \
    && chmod 1777 /home/pivot /cache /work
ENV PATH=/opt/pivot/venv/bin:${PATH} \
    HOME=/home/pivot \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor
USER ${UID}
RUN docker/install.sh check /opt/pivot/venv && find /cache -mindepth 1 -delete
VOLUME /cache
WORKDIR /work

CMD ["pivot", "doctor"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="PIVOT-Megatron" \
    org.opencontainers.image.description="Evolves vision encoders by preference training through a language-model head" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${REVISION}"
