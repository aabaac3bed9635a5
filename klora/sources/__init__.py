"""References to LoRAs -> what to fetch and from where. Asks Hugging Face, CivitAI, Replicate and the servers of links.

reference    one grammar: text -> one of kinds, values that are safe in keys and logs; urls: web addresses' share of it
local        what lies at a path on this machine
authorities  whom to ask about a reference; hub, civitai, replicate, web: one each; authority: what they share
download     what a reference comes to        fetch      its bytes, counted, resumed where they broke off
network      GET, every redirect checked      addresses  whom it may ask           connection  to checked addresses
answer       status, headers and body         deadline   the end of all waiting   retries     formats  what a file is
"""
