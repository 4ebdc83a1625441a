# Two images: distfit with MPI and Horovod on CPUs, and the same for NVIDIA GPUs.
#
#   docker build --target cpu  -t distfit:cpu  .
#   docker build --target cuda -t distfit:cuda .
#   docker run --rm distfit:cpu distfit doctor
#   docker run --rm --gpus all --shm-size 2g -v "$PWD/data:/opt/distfit/data" -v "$PWD/runs:/opt/distfit/runs" \
#       distfit:cuda distfit train configs/digits.yaml
#
# launch/mpijob.yaml runs the same image as launcher and worker of a Kubernetes MPIJob: sshd is in it, and may be
# started by the user 1000. Another Python or CUDA: --build-arg PYTHON=3.13, --build-arg CUDA=12.8.1. CUDA stays
# below 13, as TensorFlow's own libraries do; the tags are listed at hub.docker.com/_/python and hub.docker.com/r/nvidia/cuda.
#
# What is installed, and how, is the Makefile's business. Each image is built in a first stage that has compilers;
# the second one takes its virtual environment. No HEALTHCHECK: a training ends by itself, and its exit code says how.

ARG PYTHON=3.12
ARG CUDA=12.9.1

FROM python:${PYTHON}-slim-bookworm AS cpu-build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.* make=4.3* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/distfit
COPY pyproject.toml README.md LICENSE Makefile ./
COPY distfit distfit
# pip's downloads and the compiled Horovod stay on the building machine, for the next build.
RUN --mount=type=cache,target=/root/.cache \
    make install VENV=/opt/venv GPUS=

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS cuda-build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++=4:13.* make=4.3* python3.12-dev=3.12.* python3.12-venv=3.12.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/distfit
COPY pyproject.toml README.md LICENSE Makefile ./
COPY distfit distfit
# There is no GPU to be seen while an image is built, so it is said.
RUN --mount=type=cache,target=/root/.cache \
    make install VENV=/opt/venv GPUS=all

FROM python:${PYTHON}-slim-bookworm AS cpu
# sshd's own keys would be the same in every container; those of a job come with it. Without PAM, which needs
# root, sshd runs as a user, and logs in nobody whose password field is "!".
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-server=1:9.2* openssh-client=1:9.2* tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && printf 'UsePAM no\nPasswordAuthentication no\n' > /etc/ssh/sshd_config.d/distfit.conf \
    && install -d /run/sshd \
    && useradd --uid 1000 --create-home --shell /bin/bash --password '*' distfit
WORKDIR /opt/distfit
COPY --from=cpu-build /opt/venv /opt/venv
COPY LICENSE README.md pyproject.toml ./
COPY distfit distfit
COPY configs configs
RUN install -d -o distfit -g distfit data runs
# A container may forbid ranks to read each other's memory (github.com/open-mpi/ompi/issues/4948).
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2 \
    OMPI_MCA_btl_vader_single_copy_mechanism=none
LABEL org.opencontainers.image.title="distfit" \
      org.opencontainers.image.description="Distributed training for Keras 3, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
# The first process of a container gets no SIGTERM unless it asks for it; tini does, and hands it on.
ENTRYPOINT ["tini", "--"]
CMD ["distfit", "--help"]

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS cuda
# As above; Ubuntu gives the number 1000 to a user of its own.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        python3.12=3.12.* openssh-server=1:9.6* openssh-client=1:9.6* tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && printf 'UsePAM no\nPasswordAuthentication no\n' > /etc/ssh/sshd_config.d/distfit.conf \
    && install -d /run/sshd \
    && userdel --remove ubuntu \
    && useradd --uid 1000 --create-home --shell /bin/bash --password '*' distfit
WORKDIR /opt/distfit
COPY --from=cuda-build /opt/venv /opt/venv
COPY LICENSE README.md pyproject.toml ./
COPY distfit distfit
COPY configs configs
RUN install -d -o distfit -g distfit data runs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2 \
    OMPI_MCA_btl_vader_single_copy_mechanism=none
LABEL org.opencontainers.image.title="distfit" \
      org.opencontainers.image.description="Distributed training for Keras 3, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
ENTRYPOINT ["tini", "--"]
CMD ["distfit", "--help"]
