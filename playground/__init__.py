"""A page in the browser for a server of K-LoRA: all it knows of K-LoRA is what the server says over HTTP.

connection   JSON over HTTP with one server     cog, replicate   a request, from its inputs to its end
address      which of the two is where          errors           what the user is told
form         the server's form, as data         controls         the same, to fill in
outputs      files that come back               progress         how a request stands, to look at
trained      LoRAs behind short names           dial             the slider between subject and style
fusion, training   the two tabs                 app              the page
"""
