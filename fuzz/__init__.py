"""The engines that search by concrete runs: random, hypothesis, atheris and exhaustive."""
