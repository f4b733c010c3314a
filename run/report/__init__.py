"""A page to look at: what a run did, in one file, without a server or a network.

    python -m run.report output/demo             writes output/demo/report.html
    python -m run.report output/demo --watch     and again as the run goes on

    folder.py    what a run's folder holds: metrics, completions, tokens
    story.py     the same, put together for the page: steps, groups, completions
    page.py      page.html with its style, its scripts and the data in it
    summary.py   accuracy before and after, five completions, the curve as a picture
    page.js      steps, groups, search     tokens.js   colours of tokens     charts.js   curves

Whatever a model wrote is untrusted. It stands in the page as JSON and is shown as text; nothing of
it is ever read as HTML. The page's own policy forbids any script but its own, and any network.
"""
