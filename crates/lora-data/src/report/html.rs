//! The report as one page that needs nothing else: pictures with the part that is kept, what training sees, findings.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use htmlize::{escape_attribute, escape_text};

use super::{DatasetReport, PictureReport};
use crate::finding::Finding;

const STYLE: &str = "
:root{color-scheme:light dark;--line:#8884;--bad:#c0392b;--warn:#b9770e;--soft:#8881}
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:inline-block;height:.7rem;background:#4a86c5}
.lost{color:var(--bad);font-weight:600}.warning{color:var(--warn);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.8rem}
.card{background:var(--soft);border-radius:6px;padding:.5rem;font-size:.8rem;overflow-wrap:anywhere}
.frame{position:relative;display:inline-block;line-height:0}.frame img{max-width:100%;border-radius:3px}
.frame i{position:absolute;border:2px solid #ff3b30;box-shadow:0 0 0 1px #fff8;box-sizing:border-box}
code{overflow-wrap:anywhere}
";

/// The whole page.
pub fn page(title: &str, report: &DatasetReport) -> String {
    let mut page = String::new();
    // Writing into a string cannot fail.
    let _ = write(&mut page, title, report);
    page
}

fn write(page: &mut String, title: &str, report: &DatasetReport) -> std::fmt::Result {
    let title = escape_text(title);
    write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">"
    )?;
    write!(page, "<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>")?;
    write!(
        page,
        "<p>{} pictures, {} visits an epoch ({} of regularisation), {} batches; {} different captions, {} pictures without text.</p>",
        report.pictures.len(),
        report.visits,
        report.regularisation_visits,
        report.batches,
        report.captions.different,
        report.captions.empty
    )?;

    write!(page, "<h2>Findings</h2>")?;
    if report.findings.is_empty() {
        write!(page, "<p>Nothing is the matter.</p>")?;
    } else {
        write!(page, "<table><tr><th>file<th>what<th>particulars<th>remedy</tr>")?;
        for finding in &report.findings {
            write!(
                page,
                "<tr><td><code>{}</code><td class=\"{}\">{}<td>{}<td>{}</tr>",
                escape_text(finding.path.to_string_lossy()),
                finding.kind.severity().name(),
                finding.kind.name(),
                escape_text(&finding.detail),
                finding.kind.remedy()
            )?;
        }
        write!(page, "</table>")?;
    }

    write!(page, "<h2>Buckets</h2><table><tr><th>size<th class=\"n\">visits<th></tr>")?;
    let most = report.buckets.values().max().copied().unwrap_or(1).max(1);
    for (bucket, visits) in &report.buckets {
        let width = 20.0 * *visits as f64 / most as f64;
        write!(
            page,
            "<tr><td>{bucket}<td class=\"n\">{visits}<td><span class=\"bar\" style=\"width:{width:.2}rem\"></span></tr>"
        )?;
    }
    write!(page, "</table>")?;

    if !report.previews.is_empty() {
        write!(page, "<h2>What training will see</h2><div class=\"cards\">")?;
        for preview in &report.previews {
            write!(
                page,
                "<div class=\"card\"><div class=\"frame\"><img alt=\"{}\" src=\"data:image/jpeg;base64,{}\"></div><div>{}×{}</div><div>{}</div></div>",
                escape_attribute(&preview.name),
                STANDARD.encode(&preview.jpeg),
                preview.size.0,
                preview.size.1,
                escape_text(&preview.caption)
            )?;
        }
        write!(page, "</div>")?;
    }

    write!(page, "<h2>Pictures and what is kept of them</h2><div class=\"cards\">")?;
    let mut by_path: HashMap<&Path, Vec<&Finding>> = HashMap::new();
    for finding in &report.findings {
        by_path.entry(&finding.path).or_default().push(finding);
    }
    let mut shown: Vec<&PictureReport> =
        report.pictures.iter().filter(|picture| !picture.thumbnail.is_empty()).collect();
    shown.sort_by_key(|picture| !by_path.contains_key(picture.path.as_path()));
    for picture in &shown {
        card(page, picture, by_path.get(picture.path.as_path()).map_or(&[], Vec::as_slice))?;
    }
    write!(page, "</div>")?;
    if shown.len() < report.pictures.len() {
        write!(page, "<p>{} of {} pictures are shown.</p>", shown.len(), report.pictures.len())?;
    }

    if !report.tags.is_empty() {
        write!(page, "<h2>Most frequent tags</h2><p>")?;
        for (tag, count) in &report.tags {
            write!(page, "{} <b>{count}</b> &nbsp; ", escape_text(tag))?;
        }
        write!(page, "</p>")?;
    }
    write!(page, "</html>")
}

fn card(page: &mut String, picture: &PictureReport, findings: &[&Finding]) -> std::fmt::Result {
    let name = picture.path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let [left, top, width, height] = picture.kept.map(|share| 100.0 * share);
    write!(
        page,
        "<div class=\"card\"><div class=\"frame\"><img alt=\"{}\" src=\"data:image/jpeg;base64,{}\">\
         <i style=\"left:{left:.2}%;top:{top:.2}%;width:{width:.2}%;height:{height:.2}%\"></i></div>",
        escape_attribute(&*name),
        STANDARD.encode(&picture.thumbnail)
    )?;
    write!(
        page,
        "<div><b>{}</b></div><div>{}×{} → {}×{}, {:.0}% cut away</div><div>{}</div>",
        escape_text(&*name),
        picture.size.0,
        picture.size.1,
        picture.bucket.0,
        picture.bucket.1,
        100.0 * picture.trimmed,
        escape_text(&picture.caption)
    )?;
    for finding in findings {
        write!(
            page,
            "<div class=\"{}\">{}: {}</div>",
            finding.kind.severity().name(),
            finding.kind.name(),
            escape_text(&finding.detail)
        )?;
    }
    write!(page, "</div>")
}
