"""Labels for rows that have none: by rules, by models, and by people where these are not sure.

rules       what rules say of a text, and how their votes are weighed
embedding   how near a text lies to what describes a label
asking      a chat model's choice
studio      Label Studio: tasks for people, and what they have said
agreement   how far people agree
deciding    one label of all that was said, or a task
plan        the rows and where they will lie, without Ray
build       all of it on Ray Data
"""
