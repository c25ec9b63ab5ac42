//! Messages as a template sees them: a role and one string.

use serde::Serialize;

use crate::types::{ChatMessage, Content, ContentPart};

/// A flattened message.
#[derive(Debug, Serialize)]
pub(super) struct TemplateMessage {
    pub(super) role: String,
    pub(super) content: String,
}

impl From<&ChatMessage> for TemplateMessage {
    fn from(message: &ChatMessage) -> Self {
        let text = match &message.content {
            Content::Text(text) => text.clone(),
            Content::Parts(parts) => parts.iter().map(part_text).collect(),
        };
        // Calls the model made are shown to it as it wrote them.
        let content = if text.is_empty() && !message.tool_calls.is_empty() {
            serde_json::Value::from(message.tool_calls.clone()).to_string()
        } else {
            text
        };
        Self { role: message.role.clone(), content }
    }
}

fn part_text(part: &ContentPart) -> String {
    match part {
        ContentPart::Text { text } => text.clone(),
        ContentPart::ImageUrl { image_url } => format!("![]({})", image_url.url),
    }
}
