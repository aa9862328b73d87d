"""Runs two checkpoints, in any format and by any runner, and says how far apart they are and where they part.

Imports point left (formats, model, convert, quant); nothing imports this folder.
"""
