# megalong and all that it needs, run as a normal user.
#
#     docker build -t megalong .
#     docker run --rm --gpus all --ipc=host megalong                  # what works here: the doctor
#     docker run --rm --gpus all --ipc=host -v "$PWD/runs:/runs" megalong \
#         torchrun --nproc-per-node=8 pretrain_longnet.py --save /runs/longnet ...
#
# The base brings PyTorch, CUDA, NCCL, Triton and Transformer Engine, built for each other. A
# smaller one, without NVIDIA's extras, does as well:
#     docker build --build-arg BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-devel -t megalong .
# Of the extras in pyproject.toml all but `eval` and `dev` are in it; --build-arg
# EXTRAS=hf,data,eval, or EXTRAS= for none, makes another choice.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE}

# The image's Python is the environment; pip need not protect the system from us.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1

RUN useradd --create-home megalong \
    && install --directory --owner=megalong /home/megalong/megalong
WORKDIR /home/megalong/megalong

# The dependencies, in a layer that a change of the code leaves alone: those of a megalong without
# code, in whose place the code comes below. pip keeps the base's torch.
ARG EXTRAS=hf,data
COPY requirements.txt pyproject.toml dependencies/
RUN cd dependencies && touch README.md LICENSE \
    && python3 -m pip install ".${EXTRAS:+[$EXTRAS]}" && rm -r ../dependencies

COPY --chown=megalong . .
RUN python3 -m pip install --no-deps --editable .

USER megalong
CMD ["python3", "-m", "megalong.doctor"]
