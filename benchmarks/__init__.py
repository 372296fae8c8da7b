"""Measurements of this cluster beside Apache RocketMQ's own servers. ``docs/benchmarks.md`` says how they are made."""
