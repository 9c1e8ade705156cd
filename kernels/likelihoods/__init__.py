"""The likelihoods in Triton, a file each.

A file has ``value(x, data, *parameters)``, log p of an element but for FACTOR, and
``gradient(g, x, *parameters)``, what reaches x and each parameter when g arrives. Optional:

- FACTOR, of the sum;
- ``data(x)``: what x adds by itself, and what of it ``value`` takes as ``data``;
- SHARED_LOG: ``value`` returns a pair, with odds in [0, 1] whose log(1 + odds) is to be added;
- PADDING: a first parameter with which, and x = 0, ``value`` adds nothing;
- HEAVY: both are long: a program takes fewer elements;
- FINITE: ``gradient`` of finite arguments is finite, so that where g is 0 nothing need be masked.
"""
