"""All checks that need a GPU, run unattended in a checkout, installed or not: two calls, each within a fixed time.

    make gpu-check [GPU_PYTHON=python3] [GPU_FLAGS="--stage a|b|both --out FOLDER --vllm-part FILE --dry-run ..."]

Stage a (540 s) runs the kernels' tests, exactness, a decode step, the paper's table 4 and the kernels' bandwidth. What
it found decides stage b (240 s): larger batches; or the failing kernel test under compute-sanitizer; or vLLM's log and
one corrected start. Each step has a time limit of its own and is killed with all its processes when it is over; the
next begins whatever became of it. After each step everything so far (results, logs, environment) is in one archive,
OUT/gpu-check-STAGE.tar.gz.

plan: the steps and their limits; run: one step; pack: the archive, and the packages of a machine without network;
machine: what is there; cli: the command line and the loop over the steps.
"""
