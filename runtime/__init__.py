"""Part of Quorate; see docs/architecture.md."""
