"""What a person looks at: pages of a run, of a comparison of runs, and of prepared data.

Imports matplotlib (in charts.py alone, as late as can be), jinja2 and rich; of qorpo whatever stands below planning, so
that training can end in a page. A run is read from its folder's files alone, as far as they go: no model, no weights.
Begin with run_report.py; run_files.py reads, findings.py says it in words, charts.py draws, page.py makes the HTML.
"""
