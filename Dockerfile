# docker build -t barlow . && docker run -p 8000:8000 -v "$PWD/models:/app/models:ro" barlow
FROM python:3.12-slim-bookworm AS python
ENV PYTHONUNBUFFERED=1

# The whole pipeline. Mount the project, with its .git, over the copy: DVC finds its files and versions there.
#   docker build --target train -t barlow-train .
#   docker run --user "$(id -u):$(id -g)" --shm-size 2g -v "$PWD:/project" barlow-train
FROM python AS train
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /project
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements.lock
COPY pyproject.toml README.md ./
COPY src src
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
ENV HOME=/tmp DVC_NO_ANALYTICS=1 DO_NOT_TRACK=1
USER 10001:10001
CMD ["dvc", "repro"]

# The default: onnxruntime and an HTTP server, without torch, DALI, DVC or Prefect. pyarrow is left out too: only
# `barlow embed` needs it, and it would double the size of the image.
FROM python AS serve
WORKDIR /app
COPY requirements-serve.lock ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements-serve.lock
COPY src src
# models/encoder.onnx and models/index, if they are there at build time. Otherwise mount them at /app/models.
COPY models models
ENV PYTHONPATH=/app/src
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
CMD ["python", "-m", "barlow.cli", "serve", "--host", "0.0.0.0", "--port", "8000"]
