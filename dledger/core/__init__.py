"""The Raft state machine: events in, effects out. No I/O, no clock, no trio.

    raft = Raft(node_id, voters, config, rng, hard_state, log, now, commit_index=0, recovering=False, configs=())
    effects = raft.step(event)

Start with the essay on top of `raft.py`.
"""
