"""Replicas: engines in processes of their own, on one machine, behind one shared queue.

- `dispatch`: which replica gets which request, and what becomes of a dead one's; pure logic.
- `messages`: what the main process and a replica tell each other.
- `serve`: a replica's process: its engine, and the loop that feeds it from the messages.
- `pool`: the main process's side, which stands where a run has its engine; `remote`: one replica, seen from there.
- `merging`: the iterations of several replicas as one course of time.
- `figures`, `totals`: what each replica did, and all together, for the report.
- `start`: which GPUs, threads and memory each gets.
"""
