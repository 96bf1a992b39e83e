"""Prefill and decode in processes of their own, so that a long prompt slows nobody's answer.

    server ---- Coordinator
                 |  Read: prompt         ^ Outputs: tokens
                 v                       |
            prefill unit ---------> decode unit
                  pages, with checksums

A unit is a whole engine in a process (unit.py); the server holds no model. The coordinator sends a
prompt to a prefill unit once a decode unit has room for it. The prefill unit gives the latents to
the decode unit page by page (handover.py), and the decode unit's tokens come to the coordinator.
Which unit gets what is decided by a state machine of plain values (dispatch.py).

A unit that dies or hangs is started again (unit_process.py). Its requests go on at another unit of
its kind, from the tokens that have been delivered; where there is none they end with an error.

Each unit has a mesh of its own. Without processes (one_process.py) two engines of one process, on
devices of their own, do the same: prefill steps in a thread, handovers stay in memory.
"""
