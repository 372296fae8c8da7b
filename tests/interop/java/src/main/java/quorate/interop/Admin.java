package quorate.interop;

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import org.apache.rocketmq.tools.command.MQAdminStartup;

/**
 * Runs stock mqadmin sub-commands in one JVM: each line of standard input is one command, its words parted by tabs. What
 * the command prints is framed by a line for its begin and one for its end.
 */
public final class Admin {
    static final String BEGIN = "@@@ begin";
    static final String END = "@@@ end";

    private Admin() {
    }

    public static void main(String[] args) throws Exception {
        System.setErr(System.out);
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        String line = lines.readLine();
        while (line != null) {
            System.out.println(BEGIN);
            MQAdminStartup.main0(line.split("\t"), null);
            System.out.println();
            System.out.println(END);
            System.out.flush();
            line = lines.readLine();
        }
        System.exit(0);
    }
}
