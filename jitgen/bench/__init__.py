"""Benchmarks of jitgen against its peers, side by side in one process: what ``jitgen bench`` runs.

    config      what the user asked                      workloads   shapes and variants
    method      how a call is timed                      check       whether an output deserves a figure
    peers       who is timed                             contest     one group of contenders, start to end
    results     figures and ratios                       tables      throughput and variants as tables
    report      header, text, JSON                       cli         the command
    dense, short, fp8, variants, cpu, jit, decode, prefill, mla, cache, cascade, sparse   the suites
    listed                                               how suites short, fp8, prefill, mla, cascade and sparse run
    decode_peers                                         batches and contenders of suite decode
    probe, spellings                                     what suite jit runs in fresh processes
    deploy, deploy_probe, deploy_variants                what suite deploy builds, and runs in fresh processes

Importing this package loads neither torch nor a suite.
"""

from __future__ import annotations

# name -> (module with run(config) -> list[SuiteReport], one line for --help)
SUITES = {
    "jit": ("jitgen.bench.jit", "first call cold and from disk, host time of a call on a hit, number of modules"),
    "cpu": ("jitgen.bench.cpu", "throughput on the CPU: plain attention and variants"),
    "dense": ("jitgen.bench.dense", "throughput of plain attention, causal and full"),
    "short": ("jitgen.bench.short", "few query rows over many keys of dense tensors: a decode step without pages"),
    "fp8": ("jitgen.bench.fp8", "attention over e4m3 tensors, beside the same numbers in bfloat16"),
    "decode": ("jitgen.bench.decode", "bandwidth of paged decode: batches of equal, uniform and Zipf lengths"),
    "prefill": ("jitgen.bench.prefill", "throughput of prompts and chunks of them through a plan, keys ragged or in pages"),
    "mla": ("jitgen.bench.mla", "bandwidth and throughput of decode with latent attention: 128 and 16 heads"),
    "cascade": ("jitgen.bench.cascade", "decode of requests that share a prefix, beside the same unshared"),
    "sparse": ("jitgen.bench.sparse", "attention over 10, 25 and 50 % of the 128 x 128 blocks, beside dense"),
    "cache": ("jitgen.bench.cache", "append to a paged cache with rotation, norm and quantisation, beside a copy"),
    "sampling": ("jitgen.bench.sampling", "tokens and renormalised rows at a vocabulary of 128,256: filters, batches"),
    "deploy": ("jitgen.bench.deploy", "frozen start of 20 kernels, 32 processes for one kernel, prebuild, bundle size"),
    "variants": ("jitgen.bench.variants", "soft cap, ALiBi, window, documents, sink and biases beside causal"),
}
