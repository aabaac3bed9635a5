"""Base models: what they are and how they come to be on the disk. Knows no pipelines, no LoRAs and no environment.

table   what each is, where it comes from, which files are wanted     install   fetches what a folder lacks of one
hub     its repository on the Hugging Face hub                        pget      a faster way to fetch public files
__main__  the program that fetches them, in a build and on a laptop
"""
