"""Pictures and tables of finished runs; `python -m fillm.report`."""

from fillm.lazy import lazy_names

_HOMES = {
    "FigureData": "figures",
    "ReportConfig": "config",
    "Run": "runs",
    "figures_of": "figures",
    "load_run": "runs",
    "load_runs": "runs",
    "write_report": "command",
}
__all__ = list(_HOMES)

__getattr__ = lazy_names(__name__, _HOMES)
