"""Pictures from what models and evaluators return.

Each public module has functions of arrays (or of report files) that write a
picture and return its path. Matplotlib is imported only when one is called.
"""
