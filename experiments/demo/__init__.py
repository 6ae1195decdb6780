"""The demo: where momentum beats plain meta-SGD, and where it gains little."""
