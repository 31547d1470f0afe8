"""Repeatable benchmarks. ``python -m bench --help``; docs/benchmarks.md says how to read them."""
