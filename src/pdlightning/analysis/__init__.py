"""What finished decompositions tell: one file per analysis, mathematics only. The commands stand beside this folder."""
