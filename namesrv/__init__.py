"""Routes (soft state, as in RocketMQ) and the control plane; see docs/architecture.md."""
