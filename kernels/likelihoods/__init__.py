"""Likelihoods in Triton, one file each.

A file defines ``value(x, data, *parameters)``, log p of an element divided by FACTOR, and
``gradient(g, x, *parameters)``, the gradients of x and of each parameter for upstream gradient g. Optional:

- FACTOR: factor of the sum of the values. Default: 1;
- ``data(x)``: returns the term of x alone, and the quantities of x that ``value`` takes as ``data``;
- SHARED_LOG: ``value`` returns a pair (value, odds), odds in [0, 1]; log(1 + odds) is added to the value;
- PADDING: a first parameter for which ``value`` is 0 at x = 0;
- HEAVY: both functions are long, so a program takes fewer elements;
- FINITE: ``gradient`` of finite arguments is finite, so nothing needs masking where g is 0.
"""
