# syntax=docker/dockerfile:1
# The image of text-generation-inference, name by name: entry point, programs, /data, port 80.
#
#   docker build -t quartet .
#   docker run --gpus all -p 8080:80 -v quartet-models:/data quartet --model-id HuggingFaceTB/SmolLM2-135M-Instruct
#
# The last stage is the default; --target sagemaker makes the image for Amazon SageMaker.

FROM rust:1.95-bookworm AS builder
# nvcc comes from pinned wheels (scripts/install_nvcc.sh), which pip fetches.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
# Before the sources: it changes with the pinned versions only.
COPY Makefile ./
COPY scripts/install_nvcc.sh scripts/
COPY shard/kernels/build.rs shard/kernels/
RUN make nvcc
COPY . .
RUN make build \
    && mkdir /install \
    && cp target/release/launcher target/release/shard target/release/router target/release/benchmark /install/

# Ubuntu with cuBLASLt; the driver's own library comes from the host.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /data quartet \
    && install -d -o quartet -g quartet /data
COPY --from=builder /install/ /usr/local/bin/
RUN cd /usr/local/bin \
    && ln -s launcher text-generation-launcher \
    && ln -s shard text-generation-server \
    && ln -s router text-generation-router \
    && ln -s benchmark text-generation-benchmark
ENV HF_HOME=/data \
    HF_HUB_ENABLE_HF_TRANSFER=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PORT=80
VOLUME /data
EXPOSE 80
USER 10001:10001

FROM base AS sagemaker
COPY --chmod=755 deploy/sagemaker-entrypoint.sh /usr/local/bin/
EXPOSE 8080
ENTRYPOINT ["sagemaker-entrypoint.sh"]

FROM base
ENTRYPOINT ["text-generation-launcher"]
