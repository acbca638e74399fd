# syntax=docker/dockerfile:1
#
#   docker build -t my-sdxl-worker .                                          SDXL base 1.0 inside the image
#   docker build --build-arg MODEL_ID=SG161222/RealVisXL_V5.0 -t my-worker .  another model inside the image
#   docker build --build-arg REFINER_ID=stabilityai/stable-diffusion-xl-refiner-1.0 -t my-worker .  the refiner as well
#   docker build --build-arg BAKE_MODEL=0 -t my-sdxl-worker .                 no weights: they come from RunPod's model
#                                                                             cache, or are downloaded at the first start
#   docker build --secret id=HF_TOKEN,env=HF_TOKEN ...                        a gated or private model
#   docker build --secret id=CIVITAI_API_TOKEN,env=CIVITAI_API_TOKEN ...      one that Civitai keeps for its members

# The torch wheel that requirements.txt pins is built for CUDA 13.0 and brings its CUDA libraries along (cuda-toolkit
# 13.0.3 in its metadata), so the small "base" image is enough. A CUDA 13.x program runs on any driver of the 13.x
# family (580 or newer): .runpod/hub.json allows those that RunPod has in its list.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

# gcc, libc6-dev and python3-dev: Triton builds its C module for the driver at run time (COMPILE=1, and the kernel that
# merges LoRAs), and finds no compiler and no Python.h in the base image. g++: torch compiles with it what a graph has on
# the CPU; nothing here has, and without it the first graph that does would end all compiled code.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

# HF_HOME holds the baked weights. It must not lie under /runpod-volume or /models: mounting a volume hides these.
# RUNPOD_MIN_CUDA_VERSION makes the SDK's own start-up check name a driver that is too old for this torch.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/opt/huggingface \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RUNPOD_MIN_CUDA_VERSION=13.0

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt

# Serverless workers see the network volume at /runpod-volume. The link puts /models/loras on the volume where there is
# one; where there is none the worker creates the target on the container disk when it starts.
RUN ln -s /runpod-volume/models /models

# The weights come before the rest of the code: only an edit of the modules that fetch them fetches them again.
# tests/test_docker_layout.py runs the download on exactly these files. VAE_ID is not set here: where it is set, the
# worker uses it for local model folders too, which bring a VAE of their own.
ARG BAKE_MODEL=1
ARG MODEL_ID=stabilityai/stable-diffusion-xl-base-1.0
ARG REFINER_ID=
ENV MODEL_ID=$MODEL_ID REFINER_ID=$REFINER_ID
COPY sdxl_worker/__init__.py sdxl_worker/checks.py sdxl_worker/data_uris.py sdxl_worker/errors.py sdxl_worker/kinds.py sdxl_worker/logs.py \
     sdxl_worker/masking.py sdxl_worker/prediction_marks.py sdxl_worker/settings.py sdxl_worker/text.py ./sdxl_worker/
COPY sdxl_worker/assets ./sdxl_worker/assets
COPY sdxl_worker/generate/__init__.py sdxl_worker/generate/base_model.py sdxl_worker/generate/checkpoint.py sdxl_worker/generate/vae_files.py \
     sdxl_worker/generate/checkpoint_facts.py sdxl_worker/generate/model_repo.py sdxl_worker/generate/repo_progress.py ./sdxl_worker/generate/
COPY download_weights.py ./
RUN --mount=type=secret,id=HF_TOKEN,required=false --mount=type=secret,id=CIVITAI_API_TOKEN,required=false \
    if [ "$BAKE_MODEL" = 1 ]; then \
        for name in HF_TOKEN CIVITAI_API_TOKEN; do \
            if [ -f "/run/secrets/$name" ]; then export "$name=$(cat "/run/secrets/$name")"; fi; \
        done; \
        python download_weights.py; \
    fi

COPY sdxl_worker ./sdxl_worker
COPY handler.py schemas.py test_input.json test_input_with_lora.json ./

# pip has compiled the packages; without this every cold start would compile the worker. By content: a layer may change times.
RUN python -m compileall -q --invalidation-mode checked-hash handler.py schemas.py sdxl_worker

# The exec form: the worker gets RunPod's SIGTERM itself, and can finish its job.
CMD ["python", "-u", "handler.py"]
