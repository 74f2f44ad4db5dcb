# vLLM's own image with sleb-serve in it.
#
#   docker build --tag sleb-serve .
#   docker run --gpus all --publish 8000:8000 --volume "$PWD:/work" sleb-serve \
#     serve MODEL -m /work/m.json --port 8000
ARG VLLM_VERSION=0.32.0

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY sleb_serve sleb_serve
COPY plugins plugins
COPY benchmarks/sleb_bench benchmarks/sleb_bench
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v${VLLM_VERSION}
COPY --from=wheel /wheels /wheels
# The image has all that serves. It lacks what reads calibration text for `select`; the constraints
# keep pip from replacing torch, or anything else that vLLM was built with.
# hadolint ignore=DL3013
RUN python3 -m pip list --format=freeze >/tmp/constraints.txt \
 && python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl \
 && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt accelerate datasets \
 && rm -r /wheels /tmp/constraints.txt \
# No image with a vLLM that would not load the plugin, or that the plugin is not tested with.
 && python3 -c "from sleb_serve.serving.command import check_plugin; check_plugin()"
EXPOSE 8000
ENTRYPOINT ["sleb-serve"]
CMD ["--help"]
