//! Pieces of markup: escaping and tables. Every text that reaches the page goes through [`escape`].

/// Text as the content of an element or of a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\0'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{7f}' => escaped.push('\u{fffd}'),
            _ => escaped.push(character),
        }
    }
    escaped
}

/// A table of plain texts; the first column names the row. Scrolls by itself where it is too wide.
pub(super) fn table(caption: &str, columns: &[&str], rows: &[Vec<String>]) -> String {
    let head: String =
        columns.iter().map(|column| format!("<th scope=\"col\">{}</th>", escape(column))).collect();
    let body: String = rows.iter().map(|row| table_row(row)).collect();
    let caption = escape(caption);
    format!(
        "<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"{caption}\"><table>\
         <caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )
}

/// A table that stays folded until it is asked for.
pub(super) fn folded(summary: &str, table: &str) -> String {
    format!("<details><summary>{}</summary>{table}</details>\n", escape(summary))
}

fn table_row(cells: &[String]) -> String {
    let cell = |(place, text): (usize, &String)| match place {
        0 => format!("<th scope=\"row\">{}</th>", escape(text)),
        _ => format!("<td>{}</td>", escape(text)),
    };
    format!("<tr>{}</tr>", cells.iter().enumerate().map(cell).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_markup_quotes_and_control_characters() {
        assert_eq!(escape("a <b> & \"c\" 'd'\n"), "a &lt;b&gt; &amp; &quot;c&quot; &#39;d&#39;\n");
        assert_eq!(escape("\u{0}\u{1b}[31m"), "\u{fffd}\u{fffd}[31m");
    }

    #[test]
    fn tables_escape_what_they_hold() {
        let table = table("a<b", &["<c>"], &[vec!["<d>".into(), "1 & 2".into()]]);
        assert!(table.contains("<th scope=\"row\">&lt;d&gt;</th><td>1 &amp; 2</td>"), "{table}");
        assert!(table.contains("a&lt;b") && table.contains("&lt;c&gt;"), "{table}");
    }
}
