"""What people may ask for, whatever they ask through. Knows no Cog, no model and no file but uploads.

request  the fields of a request for images    pair     what else is asked of a pair of LoRAs
fields   what a field accepts                  inputs   what a server makes of a form
options  fields as a command's options          outputs  where a command's results go
"""
