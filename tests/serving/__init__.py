"""Tests of requests that come and go."""
