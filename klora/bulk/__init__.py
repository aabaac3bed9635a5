"""A file of prompts turned into a folder of images, in batches, on one machine or on many.

lines   a prompt file -> jobs     batches   who makes which, with whom     folder   a job's files, and what is done
run     batches -> files          cluster   the same, by Ray's workers     batch    one of them, drawn and written
"""
