"""Requests that come and go: the values a server speaks in, the scheduler, and the thread that runs the engine."""
