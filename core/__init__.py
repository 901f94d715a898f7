"""bitplan: which layers of a language model need 8 bits, which take 4, why, and if training agrees.

`bitplan` itself (the folder core/) is the shared vocabulary: sites, formats, the run directory,
errors and the command line. `bitplan.probe`, `.planner`, `.qat` and `.reports` are the stages.
"""
