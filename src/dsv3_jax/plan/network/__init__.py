"""Networks of GPU clusters: what they cost, and what a model's traffic takes on them.

Imports no JAX. `topology` and the builders beside it make graphs, `routes` finds ways through them,
`transfers` turns a model's exchanges into flows, `fluid` shares links among flows until all have
ended, `simulate` puts them together. `latency`, `contention` and `deepep` stand beside: small
messages, PCIe, and measured figures (`roce` too); `commands` is `dsv3 plan network`.
"""
