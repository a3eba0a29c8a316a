"""Runnable examples, also reached as ``tickwork demo …``: written with the public API, as a user would."""
