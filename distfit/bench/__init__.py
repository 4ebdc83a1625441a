"""Benchmarks that run where distfit is installed: `distfit bench input`.

The modules: `samples` (makes images and shards), `ways` (what is measured, in a process pinned to its cores),
`child` (that process), `rounds` (asks the children in turn), `targets` (ratios and what they should be), `report`
(tables).
"""
