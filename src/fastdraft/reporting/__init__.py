"""What a run found, for people: figures picked from results, tables, charts, the HTML page, its Markdown twin, the model card.

Decides nothing about a run; it only reads what the stages left on disk. Data flows record -> results -> sections -> page.
"""
