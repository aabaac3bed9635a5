"""References to LoRAs -> what to fetch and from where. Asks Hugging Face, CivitAI and Replicate, and nobody else.

reference    one grammar: text -> one of kinds, values that are safe in keys and logs; urls: web addresses' share of it
local        what lies at a path on this machine
authorities  whom to ask of a reference; hub, civitai, replicate, web: one each; authority: what they have in common
download     what a reference comes to        fetch      its bytes, counted, begun again where they broke off
network      answers from where users say     addresses  where one may be sent    connection  to what was checked
answer       one of them, in our own words    deadline   the end of all waiting   retries     formats  what a file is
"""
