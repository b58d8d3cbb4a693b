"""What a run found, for people: tables, charts, verdict, HTML page, Markdown twin, model card."""
