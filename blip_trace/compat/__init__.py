"""Other tools' calls on this engine: a module for each tool, imported by whoever wants it, and nothing else.

Only the modules named after a package (`pyvene`, `nnsight`, `transformer_lens`) need that package.
"""
