"""A load test of `tp-runtime serve`, and of llama-cpp-python's server beside it."""
