"""Every Triton kernel compiled for three GPUs, on any machine: registers, spills and shared memory against a table.

    python -m tools.compile_kernels [--update] [--target sm_90] [--triton 3.6.0]

Triton brings NVIDIA's assembler, so no GPU and no driver is needed. table.json beside this holds what each kernel may
take; a difference is an error, and --update writes the table anew, for a diff to show. Printed beside it: how many
programs a multiprocessor holds, and the least time by bytes and by instructions.

launches: the registry of what is compiled; compiling: a launch turned into machine code and its figures; cli: the
table and the command line.
"""
