"""What people may ask for, whatever they ask through. Knows no Cog, no model and no file but uploads.

request  the fields of a request for images     fields  what a field accepts     inputs  what a server makes of a form
"""
