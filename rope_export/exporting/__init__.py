"""From a module to a graph on disk.

`export` is where the road begins. `block` and `module` say what is exported and by which inputs (a
`request`), `subject` takes either to a graph (`tracing`, lowering, `graph`), `signature` is what
that takes and gives. `stages` is where the proof and the race, which lie above, are asked for.
"""
