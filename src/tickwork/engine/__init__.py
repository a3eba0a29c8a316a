"""The engine: a queue of requests, a clock that closes windows, a planner, and the loop that joins them. No torch."""
