package quorate.interop;

import java.util.LinkedHashMap;
import java.util.Map;

/** Prints one JSON line for each scenario; the test reads them. */
final class Report {
    private Report() {
    }

    static synchronized void line(String scenario, boolean ok, long millis, String detail) {
        Map<String, Object> fields = new LinkedHashMap<>();
        fields.put("scenario", scenario);
        fields.put("ok", ok);
        fields.put("ms", millis);
        fields.put("detail", detail);
        StringBuilder text = new StringBuilder("{");
        for (Map.Entry<String, Object> field : fields.entrySet()) {
            if (text.length() > 1) {
                text.append(',');
            }
            text.append('"').append(field.getKey()).append("\":");
            Object value = field.getValue();
            text.append(value instanceof String ? quote((String) value) : String.valueOf(value));
        }
        System.out.println(text.append('}'));
        System.out.flush();
    }

    private static String quote(String value) {
        StringBuilder text = new StringBuilder("\"");
        for (char c : value.toCharArray()) {
            if (c == '"' || c == '\\') {
                text.append('\\').append(c);
            } else if (c < ' ' || c > '~') {
                text.append(String.format("\\u%04x", (int) c));
            } else {
                text.append(c);
            }
        }
        return text.append('"').toString();
    }
}
