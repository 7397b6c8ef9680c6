//! Pages that need nothing else: reports, with findings and with pictures or texts as training sees them, and contact sheets.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use htmlize::{escape_attribute, escape_text};

use super::texts::{Shown, TextReport};
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
code{overflow-wrap:anywhere}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0}mark{background:#4a86c566;color:inherit}
";

/// The whole page.
pub fn page(title: &str, report: &DatasetReport) -> String {
    let mut page = String::new();
    // Writing into a string cannot fail.
    let _ = write(&mut page, title, report);
    page
}

fn write(page: &mut String, title: &str, report: &DatasetReport) -> std::fmt::Result {
    head(page, title)?;
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

    self::findings(page, &report.findings)?;
    let buckets = report.buckets.iter().map(|(bucket, visits)| (bucket.clone(), *visits)).collect::<Vec<_>>();
    bars(page, ["Buckets", "size", "visits"], &buckets)?;

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

/// A picture of a contact sheet.
#[derive(Debug, Clone, Default)]
pub struct SheetCard {
    /// The file's name.
    pub name: String,
    /// What is written about it.
    pub caption: String,
    /// What is the matter with it; empty where nothing is.
    pub problem: String,
    /// A small JPEG.
    pub jpeg: Vec<u8>,
}

/// Pictures with their captions, as one page that needs nothing else. `summary` stands above them.
pub fn contact_sheet(title: &str, summary: &str, cards: &[SheetCard]) -> String {
    let mut page = String::new();
    // Writing into a string cannot fail.
    let _ = write_sheet(&mut page, title, summary, cards);
    page
}

fn write_sheet(page: &mut String, title: &str, summary: &str, cards: &[SheetCard]) -> std::fmt::Result {
    head(page, title)?;
    write!(page, "<p>{}</p><div class=\"cards\">", escape_text(summary))?;
    for SheetCard { name, caption, problem, jpeg } in cards {
        write!(page, "<div class=\"card\">")?;
        if !jpeg.is_empty() {
            let (name, jpeg) = (escape_attribute(name), STANDARD.encode(jpeg));
            write!(page, "<div class=\"frame\"><img alt=\"{name}\" src=\"data:image/jpeg;base64,{jpeg}\"></div>")?;
        }
        write!(page, "<div><b>{}</b></div><div>{}</div>", escape_text(name), escape_text(caption))?;
        if !problem.is_empty() {
            write!(page, "<div class=\"lost\">{}</div>", escape_text(problem))?;
        }
        write!(page, "</div>")?;
    }
    write!(page, "</div></html>")
}

/// What a page of this look begins with: a title, and the style of tables and cards.
///
/// # Errors
/// None, as writing into a string cannot fail.
pub fn head(page: &mut String, title: &str) -> std::fmt::Result {
    let title = escape_text(title);
    write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">"
    )?;
    write!(page, "<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>")
}

fn findings(page: &mut String, findings: &[Finding]) -> std::fmt::Result {
    write!(page, "<h2>Findings</h2>")?;
    if findings.is_empty() {
        return write!(page, "<p>Nothing is the matter.</p>");
    }
    write!(page, "<table><tr><th>file<th>what<th>particulars<th>remedy</tr>")?;
    for finding in findings {
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
    write!(page, "</table>")
}

/// Counts as bars, under a title and the names of two columns.
fn bars(page: &mut String, [title, name, number]: [&str; 3], rows: &[(String, usize)]) -> std::fmt::Result {
    write!(page, "<h2>{title}</h2><table><tr><th>{name}<th class=\"n\">{number}<th></tr>")?;
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    for (name, count) in rows {
        let width = 20.0 * *count as f64 / most as f64;
        write!(
            page,
            "<tr><td>{}<td class=\"n\">{count}<td><span class=\"bar\" style=\"width:{width:.2}rem\"></span></tr>",
            escape_text(name)
        )?;
    }
    write!(page, "</table>")
}

/// The page of a text dataset: counts, findings, lengths, scripts, and some rows with what is learned of them.
pub fn page_of_texts(title: &str, report: &TextReport) -> String {
    let mut page = String::new();
    // Writing into a string cannot fail.
    let _ = write_texts(&mut page, title, report);
    page
}

fn write_texts(page: &mut String, title: &str, report: &TextReport) -> std::fmt::Result {
    let TextReport { summary, .. } = report;
    head(page, title)?;
    let forms: Vec<String> = summary.forms.iter().map(|(form, count)| format!("{count} {}", form.name())).collect();
    write!(
        page,
        "<p>{}; {} rows of {} tokens, of which {} are learned; {} batches an epoch. Of what is too long, {} are cut, {} \
         split, {} left out.</p>",
        escape_text(forms.join(", ")),
        summary.rows,
        summary.tokens,
        summary.trained,
        report.batches,
        summary.cut.0,
        summary.split.0,
        summary.skipped
    )?;
    findings(page, &report.findings)?;
    bars(page, ["Lengths of documents", "tokens", "documents"], &report.lengths)?;
    bars(page, ["Lengths of rows", "filled up to", "visits"], &report.shapes)?;
    bars(page, ["Scripts", "most letters of", "documents"], &report.scripts)?;
    write!(page, "<h2>What training will see</h2><p>What is learned is marked.</p>")?;
    for Shown { place, text } in &report.shown {
        write!(page, "<div class=\"card\"><b>{}</b><pre>", escape_text(place))?;
        for (part, learned) in &text.0 {
            match learned {
                true => write!(page, "<mark>{}</mark>", escape_text(part))?,
                false => write!(page, "{}", escape_text(part))?,
            }
        }
        write!(page, "</pre></div>")?;
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
