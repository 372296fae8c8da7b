"""Engine "full": whole clusters, the real code, on virtual time from one seed, in one trio run (chaos.md 5.3)."""
